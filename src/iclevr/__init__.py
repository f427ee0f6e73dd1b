"""i-CLEVR: the course's files and pictures, and the stand-in that is rendered for them."""

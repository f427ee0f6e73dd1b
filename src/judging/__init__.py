"""How good are the pictures? The judge, the figures made of its findings, and their charts."""

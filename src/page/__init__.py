"""The page of src/app.py: what it shows of pictures, and how that looks."""

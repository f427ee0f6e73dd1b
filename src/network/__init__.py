"""The network: the U-Net, what surrounds it, and the file that keeps it."""

"""What every script stands on: settings, files, devices, processes, seeds, logging."""

"""What every room stands on: errors, files, folders; nothing of images or models."""

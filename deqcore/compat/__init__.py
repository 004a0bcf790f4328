"""Other libraries' interfaces on top of deqcore, for moving to it: ``deqcore.compat.torchdeq``."""

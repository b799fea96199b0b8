"""Policies out of training: as a module, as files of other runtimes, on a hub."""

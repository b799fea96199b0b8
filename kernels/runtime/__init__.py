"""How ops are chosen, registered and launched."""

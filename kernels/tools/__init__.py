"""What measures and checks kernels; nothing here is imported when they run."""

"""What every learner needs: flat parameters, optimizer, CUDA graphs, precision, memory."""

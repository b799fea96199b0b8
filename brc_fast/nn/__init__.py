"""Networks, their inputs and the losses of critics."""

"""Files of weights: opened without running what they hold, and brought into a network."""

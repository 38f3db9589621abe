"""Whether a direction through which a patch works is one that the model itself uses."""

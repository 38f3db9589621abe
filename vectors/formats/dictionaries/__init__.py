"""Files of sparse autoencoders as other programs write them."""

"""Evidence on a real model: data written for it and scripts that measure."""

"""One extraction method a file, each with its instance as METHOD; `vectors.extract.registry` lists them."""

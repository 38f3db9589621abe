"""Work that outlasts a request, and the upkeep of the data folder."""

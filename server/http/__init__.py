"""Between the socket and the routes: what is asked of a request before it is read, and how it ends."""

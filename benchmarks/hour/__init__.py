"""The first hour of a new user, done by a script on a real model: `make hour`."""

"""Schema migrations of the library, run by alembic whenever a library is opened."""

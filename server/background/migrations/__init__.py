"""Schema migrations of the jobs that servers share, run by alembic when they are first used."""

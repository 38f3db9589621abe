"""Schema migrations of the effects database, run by alembic when it is first used."""

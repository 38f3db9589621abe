"""What alembic runs, for the library and for the databases beside it: migrate over the connection that is handed in."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()

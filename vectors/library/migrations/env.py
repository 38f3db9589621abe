"""What alembic runs: migrate over the connection that `vectors.library.database` hands in."""

from alembic import context

from vectors.library.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata,
                  render_as_batch=True)
context.run_migrations()

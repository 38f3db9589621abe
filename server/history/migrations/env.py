"""What alembic runs: migrate over the connection that `server.history.store` hands in."""

from alembic import context

from server.history.store import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata,
                  render_as_batch=True)
context.run_migrations()

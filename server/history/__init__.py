"""What the server counted, minute by minute: for charts of the past, live views and alerts."""

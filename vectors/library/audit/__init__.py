"""The audit: who changed what, as a chain of records that shows when one was altered or taken out."""

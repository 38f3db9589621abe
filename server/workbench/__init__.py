"""Extraction and calibration with the served model, as background jobs."""

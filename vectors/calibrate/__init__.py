"""Calibration: how strong an artifact acts at which strength, beside random artifacts, and the strength for a dose."""

"""Conversations of `/v1/responses` that clients go on from."""

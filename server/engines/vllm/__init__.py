"""The vLLM engine. `host` runs in the server process, `worker` in those of vLLM, which loads `plugin`; what both know
stands beside them."""

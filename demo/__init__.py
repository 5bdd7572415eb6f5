"""The whole product in one run: `make demo`, and the servers behind `make serve`."""

"""The client against real vLLM: the host that `make rehearse` leaves running."""

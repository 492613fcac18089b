"""The node agent: serves one socket, supervises store, zygote and workers, relays tokens and remembers them."""

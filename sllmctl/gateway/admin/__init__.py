"""The admin API: what an operator sees and asks of the cluster, a module per noun, and the event stream."""

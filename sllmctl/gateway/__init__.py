"""What clients talk to: the OpenAI API, the admin API, and the router between them and the nodes."""

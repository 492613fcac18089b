"""One worker's inside: batch scheduler, KV blocks, model runner, sampler."""

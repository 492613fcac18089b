"""The warm pool: the zygote that has imported everything, and the workers forked from it."""

"""ssh into any sandbox: a server of ours, over a stream of the API, by the agents' channels."""

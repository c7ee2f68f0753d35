"""What this machine is, and which backend of each op is fastest on it."""

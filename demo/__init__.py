"""The demo: one minute of deployments under chatting users, beside the seed's plain design."""

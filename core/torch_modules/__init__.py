"""Networks in torch that both `export` and `trainer` need. Nothing else imports this folder: it loads torch."""

"""The command line. Each command is a module with `main(argv)`; nothing else imports them."""

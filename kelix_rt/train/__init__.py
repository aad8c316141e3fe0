"""How kelix-tiny was trained: a synthetic world and the recipes. Nothing else imports this."""

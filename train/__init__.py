"""A thin PyTorch trainer that makes the checkpoints the rest of the package exports. Nothing else imports it."""

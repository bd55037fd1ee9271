"""What an attacker controls, and that nothing comes of it; SECURITY.md names these tests."""

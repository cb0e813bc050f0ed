"""What leaves this project: the wheel, the sdist, the units, the Debian package."""

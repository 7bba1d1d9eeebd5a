"""Metal kernel bodies, shipped as package data. README.md here says how one is written and tested."""

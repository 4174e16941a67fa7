"""Real backup tools on a real mount, small enough for every run."""

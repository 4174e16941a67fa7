"""What a program sees of a real mount of a real server, judged from outside."""

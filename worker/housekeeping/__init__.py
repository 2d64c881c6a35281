"""What people do with what lies on the storage: see what it holds, and remove what nobody needs."""

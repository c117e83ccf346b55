"""People in the loop: what they are asked, what they answered, and the page on which they do."""

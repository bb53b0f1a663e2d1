"""Chat prompts whose answers copy from them (edit, quote, extract), and prompts for prose."""

TEXT = (
    "The old lighthouse at Marrow Point was built in 1874 by a crew of forty men under the engineer Samuel Harding. "
    "It stands thirty-one metres above the sea and its lamp can be seen for nineteen nautical miles. During the winter "
    "of 1881 a storm broke the glass of the lantern room, and keeper Ann Dolan kept the light burning by hand for "
    "three nights. The lamp was changed to electric light in 1926, and the last keeper left the station in 1988. Since "
    "then the building has been looked after by volunteers, who open it to visitors every Sunday from May to "
    "September. A small museum in the keeper's cottage shows letters, tools and the original logbooks of the station."
)
CODE = '''def total_price(items, tax_rate):
    """Return the total price of all items with tax."""
    total = 0
    for item in items:
        price = item["price"]
        quantity = item["quantity"]
        total += price * quantity
    tax = total * tax_rate
    return total + tax


def print_receipt(items, tax_rate):
    """Print one line per item and the total."""
    for item in items:
        name = item["name"]
        price = item["price"]
        quantity = item["quantity"]
        print(f"{name}: {quantity} x {price}")
    print(f"Total: {total_price(items, tax_rate)}")
'''
LETTER = """Dear Ms Okafor,
thank you for your order 48213 of 12 March. We are sorry to tell you that the blue ceramic teapot (article 7719-B) is \
not in stock at the moment. We expect a new delivery on 4 April and will send the teapot on the same day. The six \
matching cups (article 7720-B) left our warehouse this morning with the tracking number ZX 4491 0087 2213. If you \
would rather cancel the teapot, please write to orders@harbourpottery.example or call 0555 010 220 before 1 April.
Kind regards,
Tomas Lindqvist, Harbour Pottery"""
COPY = {
    "edit": f"Copy the following text exactly, but write 1875 in place of 1874.\n\n{TEXT}",
    "edit code": "Rename the function total_price to sum_price in this Python code and print the whole code."
    f"\n\n```python\n{CODE}```",
    "quote": f"Repeat this letter word for word.\n\n{LETTER}",
    "quote text": f"Here is a text:\n\n{TEXT}\n\nQuote the whole text, sentence by sentence.",
    "extract": "List every sentence of this letter that holds a number, one per line, exactly as it is written."
    f"\n\n{LETTER}",
    "extract code": f"Print only the second function of this code, exactly as it is.\n\n```python\n{CODE}```",
}
PROSE = {
    "story": "Write a story about a fisherman who finds a letter in a bottle.",
    "explain": "Explain how rain forms, for a ten-year-old.",
    "essay": "Write a short essay on why people keep gardens.",
    "letter": "Write a letter to a friend about a train journey through the mountains.",
    "history": "Tell me about the history of bread.",
    "advice": "How should I prepare for a job interview?",
}

"""Short texts in four languages, written for these tests: only the letters of the language, for models that know no others."""

RUSSIAN = (
    "Утром дед вышел на крыльцо и долго смотрел на реку. Лёд уже тронулся, и льдины шли мимо деревни медленно, как старые "
    "коровы. «Пора чинить лодку», — сказал он внуку. Мальчик побежал за инструментом, а собака — за мальчиком. К обеду "
    "лодка лежала на берегу вверх дном, пахло смолой, и дед рассказывал, как в молодости он проплыл до самого моря.\n"
)
TURKISH = (
    "Sabah erkenden pazara gittik. Annem domates, biber ve taze ekmek aldı; ben de küçük bir karpuz seçtim. Yaşlı satıcı "
    "gülümsedi: \"Bu karpuz bal gibi tatlıdır, çocuğum.\" Öğleden sonra bahçede oturduk, çay içtik ve rüzgârın ağaçlarda "
    "söylediği şarkıyı dinledik. Akşam olunca ışıklar yandı, İstanbul uzakta bir gemi gibi parlıyordu.\n"
)
POLISH = (
    "W małym miasteczku nad Wisłą żył zegarmistrz, który nigdy się nie śpieszył. Ludzie przynosili mu zegary, a on najpierw "
    "parzył herbatę. „Czas lubi, gdy się go słucha” — mówił. Pewnej zimy zepsuł się zegar na ratuszu i całe miasto przestało "
    "się spóźniać, bo nikt nie wiedział, która jest godzina. Było to najspokojniejsze pół roku w jego dziejach.\n"
)
ENGLISH = (
    "The ferry left the harbour at six, when the fog was still on the water. Nobody spoke. A woman with a basket of apples "
    "counted them twice and smiled, and the captain rang the bell although there was nothing to be warned of. Half way "
    "across the sun came up, and everybody began to talk at once, as people do who have been given a day.\n"
)


def long(text: str, n_characters: int = 12000) -> str:
    """The sentences of a text in many orders."""
    sentences = text.replace("\n", " ").split(". ")
    orders = (sentences[i % len(sentences) :] + sentences[: i % len(sentences)] for i in range(n_characters))
    parts, size = [], 0
    for order in orders:
        parts.append(". ".join(order[::-1]) + "\n")
        size += len(parts[-1])
        if size > n_characters:
            break
    return "".join(parts)

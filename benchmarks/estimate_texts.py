"""The texts of benchmarks/estimate_prompts.py: eight of each kind of real text, shortest first, without a licence."""

PROSE = (
    # sports
    (
        "The home side needed only one point, but the visitors scored twice in the last five minutes and took the "
        "title back across the river."
    ),
    # law
    (
        "The tenant shall keep the premises in good repair and shall not, without the prior written consent of the "
        "landlord, alter the structure of the building or any part of it."
    ),
    # instructions
    (
        "Soak the beans overnight in plenty of cold water. In the morning drain them, cover them with fresh water, add "
        "a bay leaf and half an onion, and simmer them gently until the skins begin to split."
    ),
    # news
    (
        "A burst water main closed two of the three bridges over the canal on Thursday morning and left some four "
        "thousand households without supply until late in the evening. Engineers said that the pipe, laid in 1931, had "
        "been due for replacement next spring; the council promised a full report within a month."
    ),
    # letter
    (
        "Dear Mrs Hollis,\n\nThank you for your letter of the ninth and for the photographs of the garden, which "
        "arrived without a crease. You ask whether we still mean to come in September. We do, if my brother's knee "
        "allows it, and we should like to bring back the two suitcases of books that you lent us when the children "
        "were small. Please go to no trouble over the beds."
    ),
    # science
    (
        "Glaciers move in two ways. The ice itself deforms under its own weight, slowly, like very stiff honey, and "
        "fastest near the surface. Where the base is warm enough to melt, a film of water also lets the whole mass "
        "slide over the rock. The second motion changes with the season: in early summer meltwater reaches the bed "
        "faster than the channels there can carry it away, the pressure rises, and the glacier speeds up. By August "
        "the channels have widened, the water drains, and the same ice moves more slowly although the air is warmer "
        "than before."
    ),
    # essay
    (
        "We praise punctuality as though it were a form of honesty, and perhaps it once was. In a village with a "
        "single clock, to be late was to break a promise that everybody had heard. But a city has ten thousand clocks "
        "and no two of them are asked the same question. The friend who arrives at twenty past eight may have stopped "
        "to help a stranger find the hospital; the colleague who is never late may simply have nothing that could hold "
        "him up. What we really dislike in waiting is not the lost quarter of an hour, which we would have wasted "
        "anyway, but the suspicion that somebody else has put a price on our time and found it low. It follows that "
        "the best apology for being late is not an excuse but a good story."
    ),
    # story
    (
        "Nobody in the street could remember when the piano had been put on the pavement, only that it rained on the "
        "same night. In the morning it stood before number fourteen with its lid up and water in the keys, and a note "
        "under the music stand said: free to whoever can play it.\n\n"
        "The baker could not play, but he was the first to find it, so he pushed it under his awning and dried it with "
        "flour sacks. His wife said that it would bring mice. The children said that it would bring ghosts. It "
        "brought, on the third day, a man in a brown coat who sat down without asking and played something slow with "
        "his left hand only. When he had finished he looked at his right hand as if it belonged to somebody else, "
        "thanked the baker for the chair, and went away.\n\n"
        "He came back every morning at seven. People began to buy their bread at seven. They stood in the queue longer "
        "than they had to, and the baker, who was no fool, baked a second tray of rolls. Nobody spoke to the man, "
        "since he left so quickly, but everybody had a theory. The tailor held that he had been a soldier. The widow "
        "on the second floor had seen just such a coat on a concert poster, thirty years ago, in another country.\n\n"
        "It was the baker's daughter who settled the matter. She was nine and had small patience with theories. One "
        "morning she sat down on the right end of the bench before he came, and when he began she put in the upper "
        "notes, one finger at a time, wherever there seemed to be room for them. She was wrong in the first bar and in "
        "the second. In the third he slowed down and waited for her, and in the fourth they arrived together. The "
        "whole queue stopped breathing.\n\n"
        "When it was over, the man laughed, which nobody had heard him do. He told her that the piece was for two, "
        "that he had written it for his sister, and that for eleven years he had been playing only the half that was "
        "his. Then he took the note from under the music stand, where it had dried into a brown curl, crossed out one "
        "word, wrote another above it and gave it to her. He never came back to the bakery, and by the winter the "
        "piano was gone as well; some say that the mice had it, and some that it is played somewhere by people who "
        "wake up early and do not explain themselves. The note hangs in a frame over her own piano now, a much better "
        "one, in a house with a view of the harbour. It says: free to whoever will play it."
    ),
)

GERMAN = (
    "Wegen Bauarbeiten fährt die Linie 7 bis Freitag nicht zum Hauptbahnhof, sondern endet am alten Markt.",
    (
        "Die Zwiebeln fein hacken, in etwas Butter glasig dünsten, mit Mehl bestäuben und unter ständigem Rühren mit "
        "der heißen Brühe ablöschen."
    ),
    (
        "Der Gemeinderat hat am Montag beschlossen, das Freibad im kommenden Sommer zu sanieren. Die Kosten werden auf "
        "rund zwei Millionen Euro geschätzt; die Hälfte davon trägt das Land."
    ),
    (
        "Sehr geehrte Frau Lindner, vielen Dank für Ihre Nachricht vom 3. März. Leider müssen wir Ihnen mitteilen, "
        "dass die bestellte Lampe erst in drei Wochen wieder lieferbar ist. Selbstverständlich können Sie die "
        "Bestellung jederzeit kostenlos ändern."
    ),
    (
        "Der Eisvogel sitzt oft lange regungslos auf einem Ast über dem Wasser. Entdeckt er einen kleinen Fisch, so "
        "stürzt er sich kopfüber hinein, packt ihn mit dem Schnabel und ist nach kaum zwei Sekunden wieder an seinem "
        "Platz. Im Winter, wenn die Bäche zufrieren, verhungern viele dieser Vögel."
    ),
    (
        "Früher kannte man im Zug seine Nachbarn wenigstens für die Dauer der Fahrt. Man teilte das Abteil, die "
        "Zeitung und manchmal ein hartes Ei. Heute sitzt jeder hinter seinem Bildschirm, und wer fragt, ob der Platz "
        "noch frei ist, erschrickt fast über die eigene Stimme. Ich will nicht behaupten, dass die Gespräche von "
        "damals besonders klug gewesen wären. Aber man stieg aus und wusste etwas über Hühnerzucht, das man am Morgen "
        "noch nicht gewusst hatte."
    ),
    (
        "Als die Eisenbahn im Jahr 1867 das Tal erreichte, änderte sich das Leben der Dörfer schneller als in den "
        "zweihundert Jahren zuvor. Die Weber, die ihre Stoffe bis dahin auf dem Rücken über den Pass getragen hatten, "
        "schickten sie nun in Kisten an die Küste. Die Wirte an der alten Straße verloren ihre Gäste; zwei von ihnen "
        "wanderten aus, ein dritter baute neben dem Bahnhof ein Hotel mit vierzig Betten. Auch die Uhrzeit kam mit dem "
        "Zug: Bis dahin hatte jedes Dorf seinen eigenen Mittag gehabt, und zwischen dem ersten und dem letzten "
        "Kirchturm lagen beinahe sechs Minuten."
    ),
    (
        "Meine Großmutter besaß einen Schrank, den niemand öffnen durfte. Er stand im Flur, dunkel und breit, und wenn "
        "man an ihm vorbeiging, knarrte er, als wollte er etwas sagen. Den Schlüssel trug sie an einer Schnur um den "
        "Hals, sogar beim Schwimmen.\n\n"
        "Wir Kinder waren überzeugt, dass ein Schatz darin lag. Mein Bruder tippte auf Goldmünzen, meine Cousine auf "
        "einen verwunschenen Prinzen, und ich, die Jüngste, hoffte heimlich auf einen Hund. Jeden Sommer dachten wir "
        "uns neue Listen aus, um an den Schlüssel zu kommen. Einmal versteckten wir uns die halbe Nacht unter ihrem "
        "Bett, aber sie schlief mit der Hand auf der Brust und schnarchte so freundlich, dass wir vor ihr "
        "einschliefen.\n\n"
        "Als sie starb, war ich zweiundzwanzig. Nach der Beerdigung standen wir alle im Flur, und keiner wollte der "
        "Erste sein. Schließlich nahm meine Mutter den Schlüssel und drehte ihn um. Die Tür ging auf, leicht und ohne "
        "ein Geräusch, als wäre sie jeden Tag geöffnet worden.\n\n"
        "Der Schrank war leer. Nur an der Innenseite der Tür hing ein Zettel in ihrer runden Schrift: Ihr hattet doch "
        "jeden Sommer etwas vor. Wir lachten, bis wir weinten, und weinten, bis wir wieder lachten. Den Schrank hat "
        "heute mein Bruder. Er steht in seinem Flur, dunkel und breit, und seine Töchter dürfen ihn auf keinen Fall "
        "öffnen."
    ),
)

FRENCH = (
    "Le marché aux fleurs est ouvert tous les jours, sauf le lundi, de huit heures à midi et demi.",
    (
        "Pour ouvrir un compte, présentez-vous à l'accueil avec une pièce d'identité et un justificatif de domicile "
        "datant de moins de trois mois."
    ),
    (
        "Les pompiers ont maîtrisé dans la nuit l'incendie qui menaçait la forêt au nord du village. Personne n'a été "
        "blessé, mais une vingtaine d'hectares de pins sont partis en fumée."
    ),
    (
        "Chère Hélène, je t'écris du train, ce qui explique mon écriture. Il a neigé toute la matinée sur le plateau "
        "et nous avons déjà une heure de retard. Garde-moi une assiette de soupe, et surtout ne m'attends pas pour "
        "coucher les petits."
    ),
    (
        "Beurrez un moule et saupoudrez-le de sucre. Battez les jaunes avec la farine, versez peu à peu le lait chaud, "
        "puis remettez le tout sur le feu sans cesser de remuer. Hors du feu, ajoutez le fromage râpé et, en dernier, "
        "les blancs montés en neige très ferme. Enfournez aussitôt et n'ouvrez pas la porte avant vingt-cinq minutes."
    ),
    (
        "La marée n'est pas la même partout. Dans une baie étroite, l'eau qui arrive du large n'a pas la place de "
        "s'étaler : elle monte donc plus haut, parfois de plus de douze mètres. Au milieu de l'océan, au contraire, "
        "personne ne remarquerait rien, car la différence dépasse rarement la hauteur d'une table. La lune tire de la "
        "même façon dans les deux cas ; c'est la forme des côtes qui décide du reste. Les pêcheurs le savaient bien "
        "avant les savants et construisaient leurs maisons en conséquence."
    ),
    (
        "On dit souvent que les villes ne dorment jamais, mais c'est faux : elles dorment entre quatre et cinq heures "
        "du matin. Les derniers noctambules ont trouvé leurs clés, les premiers boulangers n'ont pas encore allumé "
        "leur four, et les feux tricolores règlent pour eux seuls une circulation qui n'existe pas. J'ai longtemps "
        "travaillé de nuit et j'ai fini par aimer cette heure-là plus que toutes les autres. On y entend des choses "
        "que le jour recouvre : l'eau sous les plaques de fonte, une horloge derrière un volet, le pas d'un chat sur "
        "une gouttière. Puis un camion passe, quelqu'un tousse, et la ville se retourne dans son lit avant de se lever."
    ),
    (
        "Le phare de la pointe n'avait plus de gardien depuis vingt ans quand Maël décida d'y passer l'hiver. La "
        "commune lui prêta la clé en haussant les épaules ; le maire lui recommanda seulement de ne pas toucher à la "
        "lampe, qui s'allumait toute seule, et de ne pas compter sur le bateau en cas de gros temps.\n\n"
        "Il emporta des livres, du riz, une radio et un accordéon dont il ne savait pas jouer. Les premiers jours, il "
        "parla tout haut pour entendre une voix. Ensuite il se tut et s'aperçut que le phare, lui, n'était jamais "
        "silencieux : le vent sifflait dans l'escalier, les vitres vibraient, la mer frappait la roche avec la "
        "régularité d'un cœur. En novembre, il avait appris trois chansons. En décembre, il en inventa une "
        "quatrième.\n\n"
        "La nuit de la grande tempête, la lampe s'éteignit. Maël monta les deux cents marches à tâtons, se souvint de "
        "la promesse faite au maire, et posa quand même les mains sur le mécanisme. Il ne trouva pas la panne. Alors "
        "il prit sa lampe de poche et tourna autour de la galerie jusqu'à l'aube, à la vitesse exacte du feu, en "
        "comptant les secondes à voix haute. Au matin, un chalutier entra dans le port. Le patron dit qu'il avait "
        "trouvé la lumière un peu faible, mais très aimable."
    ),
)

SPANISH = (
    "El próximo tren con destino a Sevilla sale a las nueve y cuarto por la vía número cuatro.",
    (
        "Se alquila piso luminoso de tres habitaciones cerca del parque, con cocina amueblada, calefacción central y "
        "plaza de garaje incluida en el precio."
    ),
    (
        "La lluvia obligó a suspender el partido a los veinte minutos, cuando el equipo local ganaba por uno a cero. "
        "Se reanudará el miércoles a puerta cerrada, según informó la federación."
    ),
    (
        "Querido Julián: por fin tenemos noticias de la cosecha. Ha sido poca, pero buena, y tu padre dice que el "
        "aceite de este año no se vende, se regala. Te mando dos botellas con el primo Andrés, que viaja el domingo y "
        "promete no abrirlas."
    ),
    (
        "Las hormigas no siguen a un jefe. Cada una deja en el suelo un rastro que las demás perciben, y cuanto más "
        "corto es el camino hasta la comida, más deprisa vuelve la hormiga y más fuerte se hace la señal. Así, sin que "
        "ninguna lo sepa, el hormiguero entero termina por elegir la mejor ruta."
    ),
    (
        "Para limpiar una cafetera vieja, llénela hasta la mitad con agua y añada el zumo de un limón. Póngala al "
        "fuego sin café y espere a que suba toda el agua; luego déjela enfriar con la tapa abierta. Repita la "
        "operación con agua sola, dos veces si el olor no se ha ido del todo. No use jabón ni estropajo, porque el "
        "metal se raya y después todo sabe a hierro. Seque bien cada pieza antes de guardarla, sobre todo la goma."
    ),
    (
        "Mi barrio tenía antes tres cines y ninguna tienda de teléfonos; ahora es al revés. No lo digo con amargura, "
        "porque también yo llevo un teléfono en el bolsillo y hace años que no hago cola para ver una película. Pero "
        "recuerdo la tarde en que cerró el último, el Avenida. El dueño puso una película sin decir cuál y dejó entrar "
        "gratis a todo el mundo. Éramos más de seiscientos, sentados hasta en los pasillos. A mitad de la sesión se "
        "rompió la cinta, como se rompía siempre, y nadie silbó. Nos quedamos a oscuras, callados, esperando, y creo "
        "que fue entonces cuando comprendimos lo que íbamos a perder."
    ),
    (
        "La abuela Remedios contaba las gallinas todas las noches, aunque sabía de sobra que eran once. Las llamaba "
        "por su nombre, una por una, y ellas iban entrando en el corral con la dignidad de unas señoras que salen de "
        "misa. Una noche de enero contó doce.\n\n"
        "Volvió a empezar. Le salieron doce otra vez. La última era blanca, pequeña, y la miraba sin miedo desde el "
        "palo más alto. Nadie en el pueblo había perdido una gallina blanca. El cura dijo que sería del pueblo vecino; "
        "el veterinario, que las gallinas no andan nueve kilómetros por la nieve. Remedios no dijo nada y le puso "
        "Doce.\n\n"
        "Doce no ponía huevos ni comía maíz. Se paseaba por la cocina como si buscara algo, y cuando alguien mentía, "
        "cacareaba. Lo descubrió el alcalde, que había venido a prometer una carretera. Desde aquel día la casa se "
        "llenó de visitas: los novios traían a los novios, los compradores a los vendedores, y hasta el juez pasó una "
        "tarde por allí, según él a tomar café."
    ),
)

CODE = (
    # shell
    'for f in logs/*.txt; do\n  gzip -9 "$f" && echo "packed $f"\ndone\n',
    # SQL
    (
        "SELECT c.name, SUM(o.total) AS spent\nFROM customers c JOIN orders o ON o.customer_id = c.id\n"
        "WHERE o.placed >= '2021-01-01'\nGROUP BY c.name ORDER BY spent DESC LIMIT 10;\n"
    ),
    # HTML
    """<form action="/search" method="get">
  <label for="q">Search the catalogue</label>
  <input id="q" name="q" type="text" required>
  <button type="submit">Go</button>
</form>
""",
    # JavaScript
    """function debounce(callback, delay) {
  let timer = null;
  return function (...args) {
    clearTimeout(timer);
    timer = setTimeout(() => callback.apply(this, args), delay);
  };
}

window.addEventListener("resize", debounce(redraw, 150));
""",
    # C
    r"""#include <stdio.h>

/* Count the lines of standard input. */
int main(void)
{
    int c;
    long lines = 0;

    while ((c = getchar()) != EOF)
        if (c == '\n')
            lines++;
    printf("%ld\n", lines);
    return 0;
}
""",
    # Java
    """package shop.cart;

import java.util.ArrayList;
import java.util.List;

public final class Cart {
    private final List<Item> items = new ArrayList<>();

    public void add(Item item) {
        if (item == null) {
            throw new IllegalArgumentException("item must not be null");
        }
        items.add(item);
    }

    public long totalInCents() {
        long total = 0;
        for (Item item : items) {
            total += item.priceInCents() * item.quantity();
        }
        return total;
    }
}
""",
    # Rust
    """use std::collections::HashMap;
use std::io::{self, BufRead};

/// How often each word occurs, the most frequent first.
fn frequencies(text: &str) -> Vec<(String, usize)> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    for word in text.split_whitespace() {
        let word = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        if !word.is_empty() {
            *counts.entry(word).or_insert(0) += 1;
        }
    }
    let mut sorted: Vec<_> = counts.into_iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    sorted
}

fn main() {
    let text: String = io::stdin().lock().lines().map_while(Result::ok).collect::<Vec<_>>().join(" ");
    for (word, count) in frequencies(&text).iter().take(20) {
        println!("{count:6} {word}");
    }
}
""",
    # Python
    r"""import heapq
from collections import defaultdict


class Graph:
    # Undirected, with a positive weight on each edge.

    def __init__(self):
        self.edges = defaultdict(dict)

    def connect(self, a, b, weight=1.0):
        if weight <= 0:
            raise ValueError(f"weight must be positive, got {weight}")
        self.edges[a][b] = weight
        self.edges[b][a] = weight

    def neighbours(self, node):
        return self.edges[node].items()

    def shortest_path(self, start, goal):
        # Dijkstra's algorithm: returns the length and the nodes on the way.
        queue = [(0.0, start)]
        best = {start: 0.0}
        came_from = {}
        done = set()
        while queue:
            distance, node = heapq.heappop(queue)
            if node in done:
                continue
            if node == goal:
                return distance, self._trace(came_from, goal)
            done.add(node)
            for other, weight in self.neighbours(node):
                candidate = distance + weight
                if candidate < best.get(other, float("inf")):
                    best[other] = candidate
                    came_from[other] = node
                    heapq.heappush(queue, (candidate, other))
        return float("inf"), []

    @staticmethod
    def _trace(came_from, node):
        path = [node]
        while node in came_from:
            node = came_from[node]
            path.append(node)
        return path[::-1]


def read_graph(filename):
    graph = Graph()
    with open(filename, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.split("#")[0].strip()
            if not line:
                continue
            try:
                a, b, weight = line.split(",")
                graph.connect(a.strip(), b.strip(), float(weight))
            except ValueError as error:
                raise SystemExit(f"{filename}:{number}: {error}") from error
    return graph


if __name__ == "__main__":
    roads = read_graph("roads.csv")
    length, path = roads.shortest_path("Harbour", "Airport")
    if path:
        print(" -> ".join(path), f"({length:.1f} km)")
    else:
        print("There is no road from the harbour to the airport.")
""",
)

DIALOGUE = (
    '"Is this seat taken?"\n"It is now," she said, and moved her bag to the floor.\n',
    "WAITER: Are you ready to order?\nGUEST: Almost. What is the soup today?\nWAITER: Leek and potato, sir.\n",
    (
        '"You sold the boat?" Henrik asked.\n"I gave it away," said his father. "To whom?" "To a man who asked more '
        'politely than you ever did."\n'
    ),
    """Caller: My heating has been off since Sunday and nobody has come.
Operator: I am sorry to hear that. May I have your customer number?
Caller: I gave it to your colleague twice. It ends in 417.
Operator: Thank you, I have found it. I can send someone this afternoon.
""",
    """NURSE. You may go in now, but only for five minutes.
EDITH. Is he awake?
NURSE. He has been awake since four, asking for his boots.
EDITH. That sounds like him. Did he ask for me?
NURSE. He asked who would bring the boots.
EDITH. (laughing) Then he is better. Tell him that I came without them.
""",
    """Interviewer: You have restored clocks for forty years. Do you still wear a watch?
Clockmaker: Never. A watch on the wrist is like a patient who follows you home.
Interviewer: What was the hardest piece you ever worked on?
Clockmaker: A tower clock in the mountains. Every winter it lost nine minutes, and nobody could say why.
Interviewer: And you found out?
Clockmaker: Bees. They had built in the case, and in the cold they moved up against the pendulum to keep warm.
""",
    """[19:02] mira: is anyone else's build red since the merge?
[19:03] tom: yes, same here. it fails in the date tests
[19:03] mira: but we did not touch dates
[19:05] jo: what timezone are you in?
[19:05] mira: lisbon
[19:06] tom: helsinki
[19:06] jo: and the server is in utc, and it is the last day of the month
[19:07] tom: oh no
[19:07] mira: so it will be green tomorrow
[19:08] jo: until the end of april, yes. i will fix it now
[19:08] tom: you are a hero
[19:09] jo: i am the one who wrote the test
""",
    """"Before we start," said the inspector, "I should like to know who put the kettle on."

"I did," said Miss Pell. "One has to do something."

"At what time?"

"When I heard the glass break. I thought: somebody will need tea."

The inspector wrote this down. "You heard glass break in the middle of the night, and you did not go to look?"

"I am seventy-four, Inspector. Whatever breaks glass at that hour is younger than I am."

"That is fair. Mr Osgood, you were in the library?"

"I was asleep in the library," said Osgood. "There is a difference."

"With the window open?"

"It was shut when I closed my eyes."

"And when you opened them?"

"There was no window to speak of." Osgood rubbed his knee. "There was a good deal of it on the carpet."

"Inside, then. Not outside on the flower bed."

"Inside. I stepped in it."

"So somebody came in," said the inspector.

"Or something was thrown," said Miss Pell, and poured. "Milk?"

"Please. Thrown by whom?"

"I should ask the boy. He has been standing behind that curtain since you arrived, and he has not moved even for the \
biscuits, which is not like him."

The curtain sighed. A boy of about ten came out from behind it with a cricket ball in his hand.

"It was still light when I hit it," he said.

"At two in the morning?"

"It was light where it was going," said the boy. "There was a lamp in the library. I wanted to see if I could."

The inspector closed his notebook. "And could you?"

"Yes, sir."

"From where?"

"From the far wall, sir. By the pear tree."

Osgood got up, went to the empty window and looked out across the lawn for a long moment. "Good heavens," he said. \
"That is eighty yards."
""",
)

LISTS = (
    "Shopping: milk, eggs, rye bread, two lemons, butter, washing powder, batteries, cat food, candles\n",
    "- call the dentist\n- pay the electricity bill\n- return the library books\n- water the ferns\n- buy stamps\n",
    (
        "1. Mercury\n2. Venus\n3. Earth\n4. Mars\n5. Jupiter\n6. Saturn\n7. Uranus\n8. Neptune\n\n"
        "Dwarf planets: Ceres, Pluto, Haumea, Makemake, Eris\n"
    ),
    """Packing list

* two warm sweaters
* rain jacket and hat
* hiking boots (waxed)
* first aid kit
* map, compass, spare batteries
* matches in a dry tin
* four days of oatmeal and rice
* soap, towel, toothbrush
""",
    """Agenda of the annual meeting

1. Welcome and apologies
2. Minutes of the last meeting
3. Treasurer's report
4. Election of officers
   a. chair
   b. secretary
   c. two auditors
5. Repair of the boat house roof
6. Summer programme
7. Any other business
8. Date of the next meeting
""",
    """Glossary

bow: the front of a ship
stern: the back of a ship
port: the left side, seen from the stern
starboard: the right side, seen from the stern
keel: the beam along the bottom to which the ribs are joined
hull: the body of the ship without masts and rigging
halyard: a rope that raises a sail
sheet: a rope that holds the corner of a sail, never the sail itself
ballast: weight low in the hull that keeps the ship upright
""",
    """Ingredients for six

- 800 g floury potatoes
- 2 large onions
- 150 g smoked bacon, in small cubes
- 3 eggs
- 4 tablespoons of flour
- 1 teaspoon of salt
- half a teaspoon of nutmeg
- oil for frying

Steps

1. Peel the potatoes and grate them coarsely.
2. Press out the water in a clean cloth.
3. Fry the bacon and the onions until golden.
4. Mix everything with the eggs, the flour and the spices.
5. Drop spoonfuls into hot oil and flatten them.
6. Turn when the edges are brown, after about four minutes.
7. Serve at once with apple sauce.
""",
    """Contents

Part One: The Valley
  1. The River and Its Names ........ 3
  2. Who Came First ........ 19
  3. Mills, Tolls and Bridges ........ 41
  4. The Year without a Summer ........ 66

Part Two: The Town
  5. A Charter and a Wall ........ 87
  6. Guilds and Apprentices ........ 104
  7. The Great Fire ........ 131
  8. Rebuilding in Stone ........ 150
  9. The School on Goose Lane ........ 173

Part Three: The Railway
  10. Surveyors in the Hay ........ 198
  11. The Tunnel ........ 214
  12. Letters from the Workers' Camp ........ 239
  13. The First Timetable ........ 260

Part Four: The Present
  14. What the Factory Left ........ 281
  15. Floods and Promises ........ 305
  16. New Neighbours ........ 322

Appendices
  A. Population by Parish ........ 341
  B. Mayors and Town Clerks ........ 348
  C. Songs of the Weavers ........ 352
  D. Weights, Measures and Coins ........ 366

Notes ........ 371
Sources ........ 398
Acknowledgements ........ 417
Index of Places ........ 421
Index of Persons ........ 430
""",
)

ARITHMETIC = (
    "17 + 26 = 43\n38 + 45 = 83\n59 + 14 = 73\n",
    "7 × 8 = 56, 7 × 9 = 63, 7 × 10 = 70, 7 × 11 = 77, 7 × 12 = 84\n",
    (
        "A train leaves at 8:40 and arrives at 11:15. From 8:40 to 11:00 it takes 2 hours and 20 minutes; 15 minutes "
        "more make 2 hours and 35 minutes.\n"
    ),
    """Solve 3x + 7 = 2x + 19.
Subtract 2x: x + 7 = 19.
Subtract 7: x = 12.
Check: 3 * 12 + 7 = 43 and 2 * 12 + 19 = 43.
""",
    (
        "Divide 9477 by 13. 13 goes into 94 seven times: 7 × 13 = 91, remainder 3. Bring down the 7: 13 goes into 37 "
        "twice, 2 × 13 = 26, remainder 11. Bring down the last 7: 117 = 9 × 13, remainder 0. So 9477 / 13 = 729.\n"
    ),
    """11 * 11 = 121
12 * 12 = 144
13 * 13 = 169
14 * 14 = 196
15 * 15 = 225
16 * 16 = 256
17 * 17 = 289
18 * 18 = 324
19 * 19 = 361
""",
    (
        "A shop buys 48 lamps at 12.50 each and pays 600.00. It sells 30 of them at 19.90, which brings in 597.00. The "
        "other 18 are sold at a discount of 20 percent: 0.8 × 19.90 = 15.92 each, and 18 × 15.92 = 286.56. Together "
        "597.00 + 286.56 = 883.56. The profit is 883.56 - 600.00 = 283.56, that is 283.56 / 600.00 = 47.26 percent of "
        "the cost.\n"
    ),
    """Find the greatest common divisor of 1071 and 462.
1071 = 2 × 462 + 147
462 = 3 × 147 + 21
147 = 7 × 21 + 0
gcd(1071, 462) = 21
Backwards: 21 = 462 - 3 × 147 = 462 - 3 × (1071 - 2 × 462) = 7 × 462 - 3 × 1071.
Check: 7 × 462 = 3234, 3 × 1071 = 3213, 3234 - 3213 = 21.

Find the greatest common divisor of 2024 and 748.
2024 = 2 × 748 + 528
748 = 1 × 528 + 220
528 = 2 × 220 + 88
220 = 2 × 88 + 44
88 = 2 × 44 + 0
gcd(2024, 748) = 44
Least common multiple: 2024 × 748 / 44 = 46 × 748 = 34408.
Check: 34408 / 2024 = 17 and 34408 / 748 = 46.
""",
)

TABLES = (
    "name,age,town\nIda,34,Bergen\nOle,41,Hamar\nSiv,28,Molde\n",
    "| Fruit | Price |\n|-------|-------|\n| apple | 0.40 |\n| pear | 0.55 |\n| plum | 0.25 |\n| fig | 0.90 |\n",
    "stop\tarrives\tleaves\nNorth Gate\t7:58\t8:00\nMill Lane\t8:11\t8:12\nOld Quay\t8:26\t8:30\nStation\t8:41\t-\n",
    """Team          P   W   D   L   Pts
Rovers        6   5   1   0   16
Harbour FC    6   4   0   2   12
Athletic      6   2   1   3    7
Wanderers     6   0   0   6    0
""",
    """ id | title               | author      | copies
----+---------------------+-------------+--------
  1 | The Salt Road       | M. Arden    |      4
  2 | A Field Guide       | P. Lund     |      2
  3 | Winter Kitchens     | R. Okoro    |      7
  4 | The Last Ferry      | M. Arden    |      1
(4 rows)
""",
    """date,station,low,high,rain_mm,wind
2019-11-01,Cape,4.1,9.8,0.0,NW
2019-11-02,Cape,3.7,8.9,2.4,W
2019-11-03,Cape,5.0,9.1,11.6,SW
2019-11-04,Cape,6.2,10.3,7.5,SW
2019-11-05,Cape,2.8,7.7,0.2,N
""",
    """| Element | Symbol | Number | Melts at (°C) | State |
|---|---|---|---|---|
| Hydrogen | H | 1 | -259 | gas |
| Carbon | C | 6 | 3550 | solid |
| Oxygen | O | 8 | -219 | gas |
| Iron | Fe | 26 | 1538 | solid |
| Copper | Cu | 29 | 1085 | solid |
| Mercury | Hg | 80 | -39 | liquid |
| Lead | Pb | 82 | 327 | solid |
""",
    """Region      Quarter   Units   Revenue   Returns
North       Q1          120     9,600         3
North       Q2          145    11,600         5
North       Q3          131    10,480         2
North       Q4          188    15,040         9
South       Q1           96     7,680         1
South       Q2          104     8,320         4
South       Q3          177    14,160         6
South       Q4          159    12,720         7
East        Q1           58     4,640         0
East        Q2           73     5,840         2
East        Q3           69     5,520         1
East        Q4           94     7,520         3
Total                 1,414   113,120        43
""",
)

CHAT = (
    """<|im_start|>user
Name the capital of Peru.<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>user
Translate "good morning" into Italian, please.<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
Hi!<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You answer in one sentence, without technical words.<|im_end|>
<|im_start|>user
Why is the sky red at sunset, but blue at noon on a clear summer day?<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
I have six eggs, some spinach and a piece of old cheese. What can I cook tonight in half an hour for four hungry \
people?<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You are a patient teacher of mathematics. Use small numbers, and end with a question to the pupil.<|im_end|>
<|im_start|>user
What is a prime number?<|im_end|>
<|im_start|>assistant
A prime number is a whole number greater than 1 that can be divided only by 1 and by itself.<|im_end|>
<|im_start|>user
Then why is 1 not one?<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You rewrite the user's text so that it is polite and clear. Keep it short.<|im_end|>
<|im_start|>user
hey, your package never showed up and i am really annoyed. this is the third time now!! i paid extra for the fast \
delivery and i want my money back today or i will tell everyone what kind of shop this is. also the man on the phone \
was rude to my mother, who only asked when it would arrive, and he hung up on her before she could give him the number\
<|im_end|>
<|im_start|>assistant
""",
    """<|im_start|>system
You help people to plan journeys by train. Ask when something is unclear.<|im_end|>
<|im_start|>user
I want to travel from the coast to the mountains with my two children and our dog. We have five days in October and do \
not want to sit in a train for more than four hours a day.<|im_end|>
<|im_start|>assistant
That sounds like a fine trip. Before I suggest a route, three short questions: how old are your children, how large is \
the dog, and would you rather sleep in one place or move on every day?<|im_end|>
<|im_start|>user
They are six and nine. The dog is small and fits in a basket. We would like to have two places to sleep, not more, \
because the packing takes us all morning.<|im_end|>
<|im_start|>assistant
Then I would divide the journey in two:

1. On the first day take the morning train along the river to the old market town, about three hours. There is a \
castle with a wooden bridge, and a swimming hall in case of rain. Stay for two nights.
2. On the third day go on with the narrow railway to the lake below the pass, about two and a half hours. The children \
can sit at the front, behind the driver. Stay for the other two nights.
3. On the fifth day return by the direct train, which takes just under four hours.

A small dog in a basket travels free of charge on all three trains. Shall I look for rooms?<|im_end|>
<|im_start|>user
Yes, but first tell me what we can do at the lake when the weather is bad, and what clothes we should bring for the \
pass in October.<|im_end|>
<|im_start|>assistant
When it rains there is a small museum of the railway in the old engine shed, where children may ring the bell, and a \
dairy that shows how cheese is made, every morning at ten. The boats go in all weathers except fog. For the pass bring \
warm jackets, hats, gloves and shoes with good soles: at noon it can be mild, but there is often snow in the shade.\
<|im_end|>
<|im_start|>user
Good. We like cheese. Please look for rooms with a kitchen, not too far from the station, and tell me what they cost \
for two nights.<|im_end|>
<|im_start|>assistant
""",
)

TEXTS = {
    "prose": PROSE,
    "german": GERMAN,
    "french": FRENCH,
    "spanish": SPANISH,
    "code": CODE,
    "dialogue": DIALOGUE,
    "lists": LISTS,
    "arithmetic": ARITHMETIC,
    "tables": TABLES,
    "chat": CHAT,
}
